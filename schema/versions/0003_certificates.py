"""The rules of certificates by statement instead of by row."""

from pathlib import Path

from alembic import op

revision = "0003"
down_revision = "0002"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the files are plain SQL, their % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0003_certificates.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("go back with a backup of the catalogue")
