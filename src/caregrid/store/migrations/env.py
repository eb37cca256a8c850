"""Alembic's entry: runs on the connection handed in by ``caregrid.store.migrate``."""

from alembic import context

from caregrid.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
