output "region" {
  description = "AWS region of everything."
  value       = var.region
}

output "bucket" {
  description = "Bucket of checkouts and runs."
  value       = aws_s3_bucket.this.bucket
}

output "runs" {
  description = "Where jobs may write run folders: for --runs_dir."
  value       = "s3://${aws_s3_bucket.this.bucket}/${local.runs_prefix}"
}

output "repository" {
  description = "Address of the image registry, to push to."
  value       = aws_ecr_repository.this.repository_url
}

output "image" {
  description = "The image that jobs run."
  value       = local.container.image
}

output "queues" {
  description = "Names of the job queues."
  value       = { for name, queue in aws_batch_job_queue.this : name => queue.name }
}

output "job_definitions" {
  description = "Names of the job definitions."
  value = {
    single = aws_batch_job_definition.single.name
    multi  = aws_batch_job_definition.multi.name
  }
}

output "log_group" {
  description = "Log group of all jobs."
  value       = aws_cloudwatch_log_group.this.name
}

output "submit_policy_arn" {
  description = "IAM policy for people and machines that submit jobs."
  value       = aws_iam_policy.submit.arn
}

output "settings" {
  description = "Settings for scripts/submit_batch.py: terraform output -raw settings > ~/.config/refrag_lightning/batch.yaml"
  value = yamlencode({
    region            = var.region
    bucket            = aws_s3_bucket.this.bucket
    prefix            = local.checkout_prefix
    cpu_queue         = "${var.name}-cpu"
    gpu_queue         = "${var.name}-gpu"
    cpu_spot_queue    = "${var.name}-cpu-spot"
    gpu_spot_queue    = "${var.name}-gpu-spot"
    single_definition = aws_batch_job_definition.single.name
    multi_definition  = aws_batch_job_definition.multi.name
    project           = var.name
  })
}
