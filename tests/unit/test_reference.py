"""References to callables: the two forms, and what is said when there is no such thing."""

import pytest

from onecard.errors import ModelError, UsageError
from onecard.reference import resolve_callable


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_models.py"
    path.write_text(
        "from dataclasses import dataclass\nimport neighbour\nanswer = 42\n"
        "def make_model():\n    return neighbour.NAME\n"
        "@dataclass\nclass Box:\n    size: int = 1\n    @staticmethod\n    def build():\n        return 'built'\n"
    )
    (tmp_path / "neighbour.py").write_text("NAME = 'next door'\n")
    return path


@pytest.fixture(autouse=True)
def _keep_path(monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))


def test_module():
    assert resolve_callable("os.path:join")("a", "b") == "a/b"


def test_file_with_neighbour_dataclass_and_nested_name(file):
    assert resolve_callable(f"{file}:make_model")() == "next door"
    assert resolve_callable(f"{file}:Box.build")() == "built"
    assert resolve_callable(f"{file}:Box") is resolve_callable(f"{file}:Box")


def test_module_in_the_working_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert resolve_callable("my_models:make_model")() == "next door"


@pytest.mark.parametrize("text", ["", "nothing", "os.path:", ":join", "os.path:1x", "not-a-module:f", "a..b:f"])
def test_unreadable(text):
    with pytest.raises(UsageError, match=r"path/to/file\.py:callable"):
        resolve_callable(text)


def test_close_names(file):
    with pytest.raises(UsageError, match="Did you mean make_model"):
        resolve_callable(f"{file}:make_modl")
    with pytest.raises(UsageError, match=r"Did you mean my_models\.py"):
        resolve_callable(f"{file.with_name('my_model.py')}:f")
    with pytest.raises(UsageError, match="there is no module 'jsonn'"):
        resolve_callable("jsonn:loads")
    with pytest.raises(UsageError, match="cannot be called"):
        resolve_callable(f"{file}:answer")


def test_import_that_fails(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import there_is_no_such_module_at_all\n")
    for _ in range(2):
        with pytest.raises(ModelError, match="ModuleNotFoundError"):
            resolve_callable(f"{broken}:f")
    broken.write_text("def (:\n")
    with pytest.raises(ModelError, match="SyntaxError"):
        resolve_callable(f"{broken}:f")
