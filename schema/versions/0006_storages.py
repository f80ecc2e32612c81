"""Path rules of storages; lost storages and their audit when they come back; progress of drains."""

from pathlib import Path

from alembic import op

revision = "0006"
down_revision = "0005"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0006_storages.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("lost storages are kept: go back with a backup of the catalogue")
