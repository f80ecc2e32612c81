"""Limits of storages and links; what drainers do now; urgency of items."""

from pathlib import Path

from alembic import op

revision = "0009"
down_revision = "0008"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0009_limits.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("limits are kept: go back with a backup of the catalogue")
