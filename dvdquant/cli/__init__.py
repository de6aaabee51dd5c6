"""The commands: dvdq-export, dvdq-inspect, dvdq-plan and dvdq-run."""
