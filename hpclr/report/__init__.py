"""Pictures of results and pages of runs. Only this room knows matplotlib, which is imported when a picture is drawn."""
