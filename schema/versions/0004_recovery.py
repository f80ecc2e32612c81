"""Recoveries, after which nothing is deleted on an old catalogue's word; storages' descriptions."""

from pathlib import Path

from alembic import op

revision = "0004"
down_revision = "0003"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the files are plain SQL, their % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    for name in ("0004_recovery_table.sql", "0004_recovery.sql"):
        cursor.execute((SQL / name).read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("recoveries are kept: go back with a backup of the catalogue")
