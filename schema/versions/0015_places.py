"""The place of a retired storage is free."""

from pathlib import Path

from alembic import op

revision = "0015"
down_revision = "0014"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0015_places.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("places may be taken again by now: go back with a backup of the catalogue")
