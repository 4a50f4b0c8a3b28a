"""Methods that search: schedules and solvers before sampling, noise and paths against a reward while sampling."""
