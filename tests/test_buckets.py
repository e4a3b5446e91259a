"""Results go to a bucket and data sets come from one: Snakemake and its S3 plugin, against a server on loopback."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.chain import copy_of, errors, run
from workflow_src.buckets import fetch_store
from workflow_src.common import config as configuration
from workflow_src.common.errors import UserError
from workflow_src.common.files import link_or_copy
from workflow_src.common.sections import Config
from workflow_src.preflight import needs
from workflow_src.workflow import checked

PUBLISHED = 'publish={to: "s3://lab/runs/one/", parts: [tables, gallery, rollouts, episodes]}'
STORES = ('episodes={stores: {bridge: "s3://lab/runs/one/episodes/tabletop"}}',)


@pytest.fixture(scope="module")
def s3():
    """A client of an empty S3 server on loopback, which the plugin finds by its environment variables."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY": "somebody", "SECRET_KEY": "secret"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"SNAKEMAKE_STORAGE_S3_{name}", value)
        yield boto3.client(
            "s3", endpoint_url=settings["ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id="somebody",
            aws_secret_access_key="secret",
        )  # fmt: skip
    server.stop()


def contents(s3, prefix):
    """Key below `prefix` → ETag, which for such small objects is the MD5 of their content. Snakemake adds hidden ones."""
    found = s3.list_objects_v2(Bucket="lab", Prefix=prefix).get("Contents", [])
    keys = {one["Key"].removeprefix(prefix): one["ETag"] for one in found}
    return {key: tag for key, tag in keys.items() if not Path(key).name.startswith(".")}


def test_results_go_to_a_bucket_and_another_run_takes_its_data_from_there(s3, finished, tmp_path):
    folder = copy_of(finished, tmp_path / "one")
    run(folder, "--", "publish", overrides=(PUBLISHED,))
    sent = contents(s3, "runs/one/")
    for part in ("tables", "gallery", "rollouts", "episodes"):
        here = {str(path.relative_to(folder / "results")) for path in (folder / "results" / part).rglob("*")
                if path.is_file() and not path.name.startswith(".")}  # fmt: skip
        assert here == {key for key in sent if key.startswith(f"{part}/")}, part
    table = s3.get_object(Bucket="lab", Key="runs/one/tables/policy_ranking.csv")["Body"].read()
    assert table == (folder / "results" / "tables" / "policy_ranking.csv").read_bytes()
    assert {"README.txt", "run_config.yaml"} < set(sent)
    kept = folder / ".snakemake" / "storage" / "s3" / "lab"
    assert kept.is_dir() and not [path for path in kept.rglob("*") if path.is_file()], "kept twice"

    done = run(folder, "--", "publish", overrides=(PUBLISHED,))
    assert "Nothing to be done" in done.stdout + done.stderr

    # What changes here replaces what is there, as a whole.
    s3.put_object(Bucket="lab", Key="runs/one/tables/of_an_older_run.csv", Body=b"")
    run(folder, "--forcerun", "show_tables", "--", "publish", overrides=(PUBLISHED,))
    again = contents(s3, "runs/one/")
    assert again == sent and s3.head_bucket(Bucket="lab")

    takes_its_data_from_there(s3, folder, copy_of(finished, tmp_path / "two"))


def takes_its_data_from_there(s3, source, folder):
    tables = [f"results/episodes/bridge/{split}/episodes.parquet" for split in ("train", "validation")]
    key = "runs/one/episodes/tabletop/train/000000003.mp4"
    good = s3.get_object(Bucket="lab", Key=key)["Body"].read()
    s3.put_object(Bucket="lab", Key=key, Body=good[:-1] + b"?")
    failed = run(folder, "--", *tables, overrides=STORES, check=False)
    (line,) = errors(failed)
    assert "train/000000003.mp4: is not the file that episodes.parquet lists; this copy is removed" in line
    assert not (folder / "results" / "episodes" / "bridge" / "train").exists()

    s3.put_object(Bucket="lab", Key=key, Body=good)
    half = folder / ".snakemake" / "storage" / "s3" / "lab" / "runs" / "one" / "episodes" / "tabletop" / "train"
    half.mkdir(parents=True)  # left by a run that was killed while it fetched
    (half / "000000000.mp4").write_bytes(good)
    run(folder, "--", *tables, overrides=STORES)
    for split in ("train", "validation"):
        there, here = source / "results/episodes/tabletop" / split, folder / "results/episodes/bridge" / split
        names = sorted(path.name for path in there.iterdir() if not path.name.startswith("."))
        assert names == sorted(path.name for path in here.iterdir())
        assert all((there / name).read_bytes() == (here / name).read_bytes() for name in names)
    latents = "results/latents/bridge/train/latents.json"
    run(folder, "--", latents, overrides=STORES)
    # What changes in the bucket is not fetched anew, or what was trained on it would be made anew as well.
    s3.put_object(Bucket="lab", Key=key, Body=good)
    without = ("episodes={stores: {bridge: results/episodes/bridge}}",)  # nor is the bucket needed any more
    for overrides in (STORES, without):
        done = run(folder, "--", latents, overrides=overrides)
        assert "Nothing to be done" in done.stdout + done.stderr


def test_a_split_that_the_bucket_lacks_is_named(s3, tmp_path):
    overrides = ('episodes={stores: {bridge: "s3://lab/nothing"}}',)
    done = run(tmp_path, "--", "results/episodes/bridge/train/episodes.parquet", overrides=overrides, check=False)
    assert done.returncode and "s3://lab/nothing/train" in done.stderr


def test_without_an_address_nothing_is_published(tmp_path):
    done = run(tmp_path, "--", "publish", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert errors(done) == [
        "error: publish.to: is empty, so there is nowhere to send results to; write s3://bucket/folder"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": {"stores": {"bridge": "s3://lab"}}}, "episodes.stores.bridge: 's3://lab' does not name a folder"),
        ({"episodes": {"stores": {"bridge": "s3://lab/{x}"}}}, "episodes.stores.bridge: 's3://lab/{x}' has one of"),
        ({"episodes": {"stores": {"bridge": "gs://lab/x"}}}, "gs:// needs snakemake-storage-plugin-gcs; pip install"),
        ({"publish": {"to": "https://lab/x"}}, "publish.to: 'https://lab/x' is not in a bucket; write s3:// or gs://"),
        ({"publish": {"to": "s3://key:secret@lab/x"}}, "publish.to: has a user or a key in its address"),
        ({"publish": {"to": "s3://lab/x", "parts": ["table"]}}, "publish.parts[0]: "),
        ({"publish": {"to": "s3://lab/x", "parts": []}}, "publish.parts: [] is empty"),
    ],
)
def test_addresses_that_mean_nothing(changes, message):
    with pytest.raises(UserError) as caught:
        checked(changes)
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_preflight_names_buckets():
    config = configuration.from_dict(
        Config, {"publish": {"to": "s3://lab/x"}, "episodes": {"stores": {"b": "s3://lab/b"}}}
    )
    texts = [need.text for need in needs._data(config, {"publish_part", "fetch_store"})]
    assert texts == ["data set b: is fetched from s3://lab/b", "results: are sent to s3://lab/x"]


def test_where_results_are_sent_changes_no_stage():
    plain, published = (configuration.from_dict(Config, given) for given in ({}, {"publish": {"to": "s3://lab/x"}}))
    from workflow_src.stages import stages

    assert stages(plain) == stages(published)


def test_a_store_without_its_table_is_not_taken_over(tmp_path):
    copy = tmp_path / "copy" / "train"
    copy.mkdir(parents=True)
    (copy / "000000000.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"episodes\.parquet: missing.*this copy is removed"):
        fetch_store.take_over(copy, tmp_path / "store" / "episodes.parquet")
    assert not copy.exists()


def test_a_second_name_replaces_what_had_it(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "folder" / "other"
    one.write_text("new")
    other.parent.mkdir()
    other.write_text("old")
    link_or_copy(one, other)
    link_or_copy(one, other)  # once more, as after an interruption
    assert other.read_text() == "new" and other.stat().st_ino == one.stat().st_ino
    assert [path.name for path in other.parent.iterdir()] == ["other"]

    def another_disk(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", another_disk)
    other.unlink()
    link_or_copy(one, other)
    assert other.read_text() == "new" and other.stat().st_ino != one.stat().st_ino
    assert [path.name for path in Path(other.parent).iterdir()] == ["other"]
