"""What ops print goes to the bucket of the settings."""

import os

import boto3
import pytest

from dlm_core.errors import StorageUnavailableError
from dlm_pipelines.instance import ComputeLogs, check_compute_logs


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DLM_COMPUTE_LOGS_BUCKET", s3.bucket)
    monkeypatch.setenv("DLM_COMPUTE_LOGS_ENDPOINT", s3.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return boto3.resource("s3", endpoint_url=s3.endpoint).Bucket(s3.bucket)


def test_what_is_printed_is_uploaded(bucket, capfd):
    """And comes back through Dagster's own interface."""
    manager = ComputeLogs.from_config_value(None, {})
    key = ["a-run", "compute_logs", "drain_replication"]
    with capfd.disabled(), manager.capture_logs(key):
        os.write(1, b"copied 17 files\n")
    texts = [o.get()["Body"].read() for o in bucket.objects.filter(Prefix="dlm-compute-logs/")]
    assert any(b"copied 17 files" in text for text in texts)
    assert b"copied 17 files" in manager.get_log_data(key).stdout


def test_a_bucket_that_cannot_be_used_is_told(bucket, monkeypatch):
    """The doctor asks for it: runs do not fail for its sake, so nobody else would tell."""
    check_compute_logs()
    monkeypatch.setenv("DLM_COMPUTE_LOGS_BUCKET", "no-such-bucket")
    with pytest.raises(StorageUnavailableError, match="no-such-bucket"):
        check_compute_logs()
    monkeypatch.setenv("DLM_COMPUTE_LOGS_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailableError, match=r"127\.0\.0\.1:9"):
        check_compute_logs()
    monkeypatch.delenv("DLM_COMPUTE_LOGS_BUCKET")
    check_compute_logs()
