"""What is shown, whoever prints it: tables, charts and the report page."""
