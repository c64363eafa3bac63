"""A report as one HTML page that needs nothing else: sections with plots, drawn by plotly, filled in by Jinja."""
