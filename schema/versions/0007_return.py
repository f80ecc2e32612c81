"""A storage that was away is, after its audit, what it was before."""

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0007_return.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("modes are kept: go back with a backup of the catalogue")
