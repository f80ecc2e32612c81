from tests.backends import s3, sshd, wsgidav  # noqa: F401
