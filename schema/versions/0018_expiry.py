"""What has expired gets no other time."""

from pathlib import Path

from alembic import op

revision = "0018"
down_revision = "0017"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0018_expiry.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("the rules in force are the newest: go back with a backup of the catalogue")
