"""What was announced and never let in can be taken back."""

from pathlib import Path

from alembic import op

revision = "0013"
down_revision = "0012"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0013_withdrawal.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("the rules in force are the newest: go back with a backup of the catalogue")
