"""A server: one model, many clients. The scheduler and its texts need nothing that the package does not; the app needs the extra
`serve`."""
