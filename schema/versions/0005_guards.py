"""No replicas on a retired storage; wrongly condemned copies and put-aside expiries come back."""

from pathlib import Path

from alembic import op

revision = "0005"
down_revision = "0004"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0005_guards.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("guards are kept: go back with a backup of the catalogue")
