"""What ops print goes to the bucket of the settings."""

import os

import boto3
import pytest

from dlm_pipelines.instance import ComputeLogs


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
