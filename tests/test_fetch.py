"""Downloads against a real server on loopback that cuts, changes and refuses."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from tests.loopback import ranges, serving
from workflow_src.common import fetch as fetching
from workflow_src.common.errors import UserError
from workflow_src.common.fetch import fetch, resolve

CONTENT = np.random.default_rng(0).bytes(3_300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with serving(CONTENT) as server:
        yield server


def whole_blocks(count):
    """Bytes that are kept when a connection ends after `count`."""
    return count // fetching.BLOCK * fetching.BLOCK


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path):
    out = tmp_path / "deep" / "file.bin"
    assert fetch(server.url, out, SHA) == fetch(server.url, out, SHA) == SHA
    assert out.read_bytes() == CONTENT and len(server.seen) == 1
    assert [path.name for path in out.parent.iterdir()] == ["file.bin"]


def test_a_cut_download_continues_where_it_stopped(server, tmp_path):
    server.faults = [1_200_000, 503, 2_500_000]
    assert fetch(server.url, tmp_path / "file.bin", SHA, pause=0) == SHA
    first = whole_blocks(1_200_000)
    second = first + whole_blocks(2_500_000 - first)
    assert ranges(server) == [None, f"bytes={first}-", f"bytes={first}-", f"bytes={second}-"]


def test_it_continues_in_another_process_and_a_finished_one_only_gets_its_name(server, tmp_path):
    server.faults = [1_000_000]
    with pytest.raises(
        UserError, match=rf"ended after {whole_blocks(1_000_000)} of 3300000 bytes, 1 times; what came is kept"
    ):
        fetch(server.url, tmp_path / "file.bin", SHA, tries=1)
    assert not (tmp_path / "file.bin").exists()
    command = [sys.executable, "-m", "workflow_src.common.fetch", server.url, "--out", str(tmp_path / "file.bin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"sha256 {SHA}" in done.stderr and ranges(server)[-1] == f"bytes={whole_blocks(1_000_000)}-"
    # Killed between the last byte and the name: the server has nothing to add.
    partial = tmp_path / ".other.bin.part"
    partial.write_bytes(CONTENT)
    fetching._remember(partial, server.url, {"ETag": '"v1"'})
    assert fetch(server.url, tmp_path / "other.bin", SHA) == SHA


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server, tmp_path):
    server.faults = [1_000_000]
    with pytest.raises(UserError):
        fetch(server.url, tmp_path / "file.bin", tries=1)
    server.content, server.etag = CONTENT[::-1], '"v2"'
    fetch(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_sure_version_nothing_is_pieced_together(server, tmp_path, etag):
    server.etag, server.faults = etag, [1_000_000]
    assert fetch(server.url, tmp_path / "file.bin", SHA, pause=0) == SHA
    assert ranges(server) == [None, None]


def test_another_content_is_refused_and_the_old_file_stays(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"old")
    with pytest.raises(UserError, match=rf"sha256 is {SHA}, not {'0' * 64}: another file, or damaged"):
        fetch(server.url, tmp_path / "file.bin", "0" * 64)
    assert (tmp_path / "file.bin").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("status", "message"), [(404, "answered 404; check the address"), (403, "refuses it .403.; it is not public")]
)
def test_a_refusal_is_one_line_at_once(server, tmp_path, status, message):
    server.faults = [status]
    with pytest.raises(UserError, match=message):
        fetch(server.url, tmp_path / "file.bin")
    assert len(server.seen) == 1


def test_no_server_is_one_line_that_says_where_to_put_the_file(tmp_path):
    with pytest.raises(
        UserError, match=r"connection failed \(ConnectionError\), 2 times; .* put the file at .*file\.bin yourself"
    ):
        fetch("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", tries=2, pause=0)


def test_hub_addresses_carry_the_token_to_the_hub_alone(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/file.bin"))
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    source = resolve("hf://owner/name@abc/folder/file.bin")
    assert source.url.endswith("/owner/name/resolve/abc/folder/file.bin") and "secret" not in repr(source)
    assert resolve("hf://datasets/owner/name/f.csv").url.endswith("/datasets/owner/name/resolve/main/f.csv")
    # The hub sends on to another host, which must not see the token.
    server.faults = [server.url.replace("127.0.0.1", "localhost")]
    fetch("hf://owner/name/file.bin", tmp_path / "file.bin", SHA)
    first, second = (headers for _, headers in server.seen)
    assert first["Authorization"] == "Bearer secret-token" and "Authorization" not in second
    server.faults = [401]
    with pytest.raises(UserError, match="HF_TOKEN is not a valid token") as refused:
        fetch("hf://owner/name/file.bin", tmp_path / "other.bin")
    assert "secret" not in str(refused.value)


def test_drive_links_and_their_warning_page(server, tmp_path, monkeypatch):
    for link in (
        "https://drive.google.com/file/d/1a-B_c/view?usp=sharing",
        "https://drive.google.com/uc?id=1a-B_c&export=download",
    ):
        source = resolve(link)
        assert source.url == fetching.DRIVE and source.parameters == {
            "id": "1a-B_c",
            "export": "download",
            "confirm": "t",
        }

    class Page:
        status_code, headers = 200, {"Content-Type": "text/html; charset=utf-8"}

    with pytest.raises(UserError, match="Google Drive sent a page instead of the file"):
        fetching._check(Page, source, link)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/file", "not an address to fetch from"),
        ("hf://owner", "not of the form hf://owner/name"),
        ("https://drive.google.com/drive/folders/abc", "no file identifier"),
    ],
)
def test_other_addresses_are_refused(address, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fetch(address, tmp_path / "file")


def test_what_is_known_before_anything_is_asked_for_is_said_at_once(server, tmp_path):
    for sha256 in ("abc", SHA[:-1], SHA + "0"):
        with pytest.raises(UserError, match="is not a sha256; give 64 hexadecimal digits"):
            fetch(server.url, tmp_path / "file.bin", sha256)
    with pytest.raises(UserError, match="is a folder; name the file"):
        fetch(server.url, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        fetch(server.url, tmp_path / "file" / "below.bin")
    assert not server.seen
    assert fetch(server.url, tmp_path / "file.bin", f" {SHA.upper()} ") == SHA


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    server.faults, server.shift = [1_000_000], 5
    assert fetch(server.url, tmp_path / "file.bin", SHA, pause=0) == SHA
    assert ranges(server) == [None, f"bytes={whole_blocks(1_000_000)}-", None]


def test_two_processes_do_not_write_one_file(server, tmp_path):
    out = tmp_path / "file.bin"
    first = fetching._alone(out, out.with_name(".file.bin.part"))
    with first, pytest.raises(UserError, match="another process is fetching"):
        fetch(server.url, out)
    assert fetch(server.url, out, SHA) == SHA


def test_secrets_in_an_address_stay_out_of_messages_and_files(server, tmp_path):
    address = server.url.replace("http://", "http://user:password@") + "?token=signature"
    server.faults = [1_000_000, 404]
    with pytest.raises(UserError) as cut:
        fetch(address, tmp_path / "file.bin", tries=1)
    with pytest.raises(UserError) as refused:
        fetch(address, tmp_path / "file.bin")
    kept = "".join(path.read_text(errors="replace") for path in tmp_path.iterdir() if path.suffix == ".json")
    for text in (str(cut.value), str(refused.value), kept):
        assert text and "password" not in text and "signature" not in text
