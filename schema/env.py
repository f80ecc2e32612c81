"""Alembic environment: migrations run on the connection that dlm_core.catalogue.schema gives."""

from alembic import context

from dlm_core.catalogue.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
