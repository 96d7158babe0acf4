"""Where settings come from, and which queue a job goes to."""

from __future__ import annotations

import pytest

from refrag_lightning.launch.batch_settings import Settings, load_settings


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("bucket: from-file\nprefix: from-file\nregion: from-file\ngpu_queue: mine\n")
    environment = {
        "REFRAG_BATCH_SETTINGS": str(file),
        "REFRAG_BATCH_PREFIX": "from-variable",
        "REFRAG_BATCH_REGION": "from-variable",
        "REFRAG_BATCH_BUCKET": "",
    }
    settings = load_settings({"region": "from-flag", "bucket": None}, environment)
    assert settings == Settings(
        region="from-flag", prefix="from-variable", bucket="from-file", gpu_queue="mine"
    )
    other = tmp_path / "other.yaml"
    other.write_text("bucket: other\n")
    assert load_settings({}, environment, str(other)).bucket == "other"


def test_the_file_of_the_home_folder_is_read_if_it_is_there(tmp_path):
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert load_settings({}, environment) == Settings()
    file = tmp_path / "refrag_lightning" / "batch.yaml"
    file.parent.mkdir()
    file.write_text("bucket: mine\n")
    assert load_settings({}, environment) == Settings(bucket="mine")
    file.write_text("")
    assert load_settings({}, environment) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("buket: x", "unknown setting 'buket'; did you mean 'bucket'"),
        ("zzz: x", "unknown setting 'zzz'; it knows region, bucket, prefix"),
        ("bucket: 3", "bucket has to be a string, not 3"),
        ("[a]", "holds no settings"),
        ("a: b: c", "is no YAML"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, text, message):
    file = tmp_path / "batch.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings({}, {}, str(file))


def test_a_named_file_has_to_be_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_settings({}, {}, str(tmp_path / "none.yaml"))


def test_a_missing_bucket_names_the_option_and_the_variable():
    with pytest.raises(ValueError, match="give --bucket, set REFRAG_BATCH_BUCKET"):
        Settings().need_bucket()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("bucket", name) for name in ("../x", "a/b", "-rm", "ab", "a" * 64, "Mine", "a..b")],
        *[("bucket", name) for name in ("192.168.1.1", "mine.", "s3://mine", "my_bucket", "a b")],
        *[("prefix", name) for name in ("../x", "a/../b", "a//b", "./a", "-a", "a b", "a\nb")],
        *[("region", name) for name in ("../x", "eu central", "-eu", "evil.example/", "EU")],
        *[("gpu_queue", name) for name in ("../x", "-q", "a b", "arn:aws:s3:::bucket")],
        *[("single_definition", name) for name in ("../x", "-q", "a:b", "a:1:2")],
        *[("project", name) for name in ("a\nb", "-a")],
    ],
)
def test_what_aws_would_not_take_as_a_name_is_refused(setting, value):
    with pytest.raises(ValueError, match=setting) as caught:
        load_settings({}, {f"REFRAG_BATCH_{setting.upper()}": value})
    assert "\n" not in str(caught.value)


def test_names_that_aws_takes():
    arn = "arn:aws:batch:eu-central-1:111122223333:job-queue/mine"
    Settings(bucket="my.bucket-1", prefix="/a/b.c/", region="us-gov-west-1", cpu_queue=arn)
    Settings(prefix="", single_definition="mine:3", project="a team: ours")
    Settings(multi_definition="arn:aws-cn:batch:cn-north-1:111122223333:job-definition/mine:12")


@pytest.mark.parametrize(
    ("num_gpus", "spot", "queue"),
    [
        (0, False, "refrag-cpu"),
        (1, False, "refrag-gpu"),
        (0, True, "refrag-cpu-spot"),
        (8, True, "refrag-gpu-spot"),
    ],
)
def test_queues_follow_from_gpus_and_spot(num_gpus, spot, queue):
    assert Settings().queue(num_gpus=num_gpus, num_nodes=1, spot=spot) == queue
    if spot:
        with pytest.raises(ValueError, match=f"2 nodes cannot run on Spot .*{queue}"):
            Settings().queue(num_gpus=num_gpus, num_nodes=2, spot=spot)
    else:
        assert Settings().queue(num_gpus=num_gpus, num_nodes=2, spot=spot) == queue


def test_a_named_queue_is_taken_but_not_for_nodes_on_spot():
    settings = Settings()
    assert settings.queue(num_gpus=1, num_nodes=2, spot=False, given="mine") == "mine"
    with pytest.raises(ValueError, match="cannot run on Spot"):
        settings.queue(num_gpus=1, num_nodes=2, spot=False, given="refrag-gpu-spot")
    with pytest.raises(ValueError, match="--queue mine has chosen one"):
        settings.queue(num_gpus=1, num_nodes=1, spot=True, given="mine")
