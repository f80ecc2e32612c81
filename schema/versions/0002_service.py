"""Holds by selector, retention locks; the audit's seals, plans to approve; scheduled checks."""

from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the files are plain SQL, their % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    for name in ("0002_holds.sql", "0002_audit.sql", "0002_plans.sql", "0002_verification.sql"):
        cursor.execute((SQL / name).read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("holds and seals are kept: go back with a backup of the catalogue")
