"""What goes into a bundle besides the export: its page and the list of wheels; for ``dvdq-bundle``."""
