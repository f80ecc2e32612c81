from tests.backends import s3, storage  # noqa: F401
