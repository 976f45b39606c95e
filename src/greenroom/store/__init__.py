"""Where the control plane keeps its records: the port (`port`) and its adapters: in memory, SQLite,
PostgreSQL."""
