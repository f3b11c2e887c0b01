"""What follows a convolution in Wan's VAEs, in one pass: its bias, what goes by it, RMS norm and SiLU."""
