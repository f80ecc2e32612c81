from tests.backends import rclonedav, s3, sshd, storage, wsgidav  # noqa: F401
