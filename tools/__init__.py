"""Tools for maintainers: what is generated in this repository, and the code that generates it."""
