from tests.backends import s3, sshd  # noqa: F401
