"""Which bundles a server may load, and by which names."""

import pytest

from onecard.errors import UsageError
from onecard.ipc.models import ModelOptions
from onecard.server.http_types import HttpError
from onecard.server.repository import Repository, Source, read_names


def bundle(folder):
    folder.mkdir()
    (folder / "onecard.json").write_text("{}")
    return folder


def test_names_of_models(tmp_path):
    found = read_names([str(tmp_path / "resnet.onecard"), f"mine={tmp_path}/other"])
    assert {name: path.name for name, path in found.items()} == {"resnet": "resnet.onecard", "mine": "other"}
    for words in (["a/b=x"], ["=x"], [f"{'n' * 129}=x"], ["x=1", "x=2"]):
        with pytest.raises(UsageError):
            read_names(words)


def test_what_is_named_goes_before_the_folder(tmp_path):
    bundle(tmp_path / "one.onecard")
    bundle(tmp_path / "two")
    (tmp_path / "nothing").mkdir()
    options = ModelOptions("cpu")
    repository = Repository({"one": Source(tmp_path / "elsewhere")}, tmp_path, options)
    assert repository.names() == ["one", "two"]
    assert repository.find("one") == Source(tmp_path / "elsewhere")
    assert repository.find("two") == Source(tmp_path / "two", options)
    (tmp_path / "two.onecard").mkdir()
    assert repository.find("two").path == tmp_path / "two"


@pytest.mark.parametrize("name", ["nothing", "..", "../secret", "/etc", "", "a b", "link"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    bundle(tmp_path / "secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "nothing").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(HttpError) as refused:
        Repository({}, folder).find(name)
    assert refused.value.status == 404


def test_without_a_folder_there_is_what_was_named(tmp_path):
    repository = Repository({"a": Source(tmp_path)})
    assert repository.names() == ["a"]
    with pytest.raises(HttpError):
        repository.find("b")
