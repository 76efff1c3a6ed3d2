"""What every kind of sandbox does alike, as named checks that run against any `Substrate`."""
