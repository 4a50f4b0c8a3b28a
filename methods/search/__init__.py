"""Methods that search: schedules and solvers found by evolution against a metric, before sampling."""
