# Nodes of a job talk to each other on any port (rendezvous, NCCL, gloo); everything else that a job
# needs is HTTPS: S3, the registry, logs, the Hugging Face Hub, Weights & Biases. Nobody calls in.

resource "aws_security_group" "this" {
  name_prefix = "${var.name}-"
  description = "Instances and containers of Batch jobs of ${var.name}"
  vpc_id      = var.vpc_id

  tags = { Name = var.name }

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "nodes" {
  security_group_id            = aws_security_group.this.id
  description                  = "From the other nodes of a job"
  ip_protocol                  = "-1"
  referenced_security_group_id = aws_security_group.this.id
}

resource "aws_vpc_security_group_egress_rule" "nodes" {
  security_group_id            = aws_security_group.this.id
  description                  = "To the other nodes of a job"
  ip_protocol                  = "-1"
  referenced_security_group_id = aws_security_group.this.id
}

resource "aws_vpc_security_group_egress_rule" "https" {
  security_group_id = aws_security_group.this.id
  description       = "HTTPS to anywhere"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_vpc_endpoint" "s3" {
  count = length(var.route_table_ids) > 0 ? 1 : 0

  vpc_id            = var.vpc_id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = var.route_table_ids

  tags = { Name = "${var.name}-s3" }
}

resource "aws_placement_group" "gpu" {
  count = var.gpu_placement_group ? 1 : 0

  name     = "${var.name}-gpu"
  strategy = "cluster"
}
