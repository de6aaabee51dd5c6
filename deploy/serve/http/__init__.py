"""The HTTP interface: routes, what every request passes first, answers, description, pages."""
