from tests.backends import s3, sshd, storage  # noqa: F401
