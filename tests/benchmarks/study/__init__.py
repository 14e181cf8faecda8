"""Does a prior do what the paper says? Small models, many seeds, controls, intervals: PLAN.md."""
