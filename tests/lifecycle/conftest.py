from tests.backends import s3, wsgidav  # noqa: F401
