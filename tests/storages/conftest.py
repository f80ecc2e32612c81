from tests.backends import rclonedav, s3, storage, wsgidav  # noqa: F401
