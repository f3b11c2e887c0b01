"""`python -m t3.embedded_files`: every place is checked before the first file is written."""

import sys

import pytest
from small_models import build_like_embedded

from t3 import embedded_files
from t3.embedded_files import FILES
from t3.errors import T3Error


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_like_embedded(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def models(tmp_path, model, monkeypatch):
    monkeypatch.setattr(embedded_files, "embedded_folder", lambda: model)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def written(models):
    return sorted(str(path.relative_to(models)) for path in models.rglob("*") if path.is_file())


@pytest.mark.parametrize("part", FILES)
def test_a_place_that_is_taken_stops_it_before_the_first_file(models, capsys, part):
    taken = models / FILES[part]
    taken.parent.mkdir()
    taken.write_bytes(b"x")
    assert embedded_files.main([str(models)]) == 2
    assert f"{taken} exists already" in capsys.readouterr().err
    assert written(models) == [FILES[part]] and taken.read_bytes() == b"x"


def test_a_package_that_is_missing_stops_it_too(models, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(T3Error, match="pip install"):
        embedded_files.write_files(model, models)
    assert not written(models)


def test_what_is_there_already_stays_and_is_told(models, capsys):
    assert embedded_files.main([str(models)]) == 0
    first, taken = (models / FILES[part] for part in ("transformer", "vae"))
    before = {path: path.stat().st_mtime_ns for path in (first, taken)}
    first.unlink()
    capsys.readouterr()
    assert embedded_files.main([str(models)]) == 0
    err = capsys.readouterr().err
    assert f"wrote      {first}" in err and f"is there   {taken}, with the same content" in err
    assert taken.stat().st_mtime_ns == before[taken] and written(models) == sorted(FILES.values())
    # One bit of another file is another file.
    content = bytearray(taken.read_bytes())
    content[-1] ^= 1
    taken.write_bytes(content)
    assert embedded_files.main([str(models)]) == 2 and f"{taken} exists already" in capsys.readouterr().err
    assert embedded_files.main([str(models), "--overwrite"]) == 0
    err = capsys.readouterr().err
    assert f"wrote      {taken}" in err and f"is there   {first}" in err
