"""What people read: tables, pages, the model card."""
