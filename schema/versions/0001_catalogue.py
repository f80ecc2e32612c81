"""The catalogue of DESIGN: nouns, queue, certificates, event feed, and their triggers."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the files are plain SQL, their % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    for name in ("0001_tables.sql", "0001_functions.sql", "0001_comments.sql"):
        cursor.execute((SQL / name).read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("the first migration has no way back: drop the database instead")
