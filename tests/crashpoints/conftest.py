from tests.backends import s3  # noqa: F401
