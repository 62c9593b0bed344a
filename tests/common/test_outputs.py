"""Files and folders that appear whole or not at all."""

import pytest

from dijiang.common.outputs import new_folder, write_text_whole, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    write_text_whole(path, "äl\n")
    write_whole(path, lambda draft: draft.write_bytes(b"new"), durable=True)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_half_written_leaves_the_old_one_and_no_litter(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write(draft):
        draft.write_text("ne")
        assert draft.parent == tmp_path and draft.name.startswith(".") and draft.suffix == ".partial"
        raise error

    with pytest.raises(error):
        write_whole(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_share_a_draft(tmp_path):
    path = tmp_path / "result.json"

    def write(draft):
        draft.write_text("outer")
        write_text_whole(path, "inner")
        assert draft.read_text() == "outer"

    write_whole(path, write)
    assert path.read_text() == "outer" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path):
    output = tmp_path / "a" / "b"

    def interrupted():
        with new_folder(output) as folder:
            (folder / "part").write_text("1")
            assert not output.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with new_folder(output) as folder:
        (folder / "part").write_text("1")
    assert (output / "part").read_text() == "1" and list(output.parent.iterdir()) == [output]


def test_a_folder_in_use_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "theirs").write_text("1")
    with pytest.raises(ValueError, match="is not empty; choose a new one or empty it"), new_folder(tmp_path):
        pytest.fail("the block must not run")
    with pytest.raises(ValueError, match="is a file; choose a new folder"), new_folder(tmp_path / "theirs"):
        pytest.fail("the block must not run")
