"""The feed is told by what changes; texts can be shown on a line."""

from pathlib import Path

from alembic import op

revision = "0017"
down_revision = "0016"

SQL = Path(__file__).resolve().parent.parent / "sql"


def upgrade() -> None:
    # the driver's own cursor: the file is plain SQL, its % signs are no placeholders
    cursor = op.get_bind().connection.cursor()
    cursor.execute((SQL / "0017_telling.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    raise RuntimeError("the rules in force are the newest: go back with a backup of the catalogue")
