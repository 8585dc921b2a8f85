"""Pictures of results. Only this room knows matplotlib, which is imported when a picture is drawn."""
