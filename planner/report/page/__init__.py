"""One self-contained HTML page: figures, sortable tables, provenance, and no file or address beside it."""
