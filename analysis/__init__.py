"""What runs wrote, read back: tables, curves and a page. Without torch."""
