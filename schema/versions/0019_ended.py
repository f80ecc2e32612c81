"""What has ended lately is counted by when it ended."""

from pathlib import Path

from alembic import op

revision = "0019"
down_revision = "0018"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0019_ended.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.drop_index("operation_ended", "operation")
