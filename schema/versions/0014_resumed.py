"""Refused deletions are found by their item."""

from pathlib import Path

from alembic import op

revision = "0014"
down_revision = "0013"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0014_resumed.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.drop_index("replica_refused", "replica")
