"""What a run says about itself: metrics, sinks, progress, trace, report."""
