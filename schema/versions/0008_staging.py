"""Files of cold storages wait to be staged; the operation kind that asks for it ahead of need."""

from pathlib import Path

from alembic import op

revision = "0008"
down_revision = "0007"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0008_staging.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("what waits for staging is kept: go back with a backup of the catalogue")
