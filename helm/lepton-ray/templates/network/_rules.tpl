{{/* Egress that every pod of the chart needs: DNS, and the store where it is a server. */}}
{{- define "lepton-ray.commonEgress" -}}
- to: {{- toYaml .Values.networkPolicy.dnsTo | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- if hasPrefix "s3://" .Values.storage.uri }}
- to: {{- toYaml .Values.networkPolicy.storage.to | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.storage.ports | default (list (include "lepton-ray.endpointPort" .)) }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- end }}

{{/* The port that storage.endpoint names, else that of its scheme. */}}
{{- define "lepton-ray.endpointPort" -}}
{{- $endpoint := trimSuffix "/" .Values.storage.endpoint -}}
{{- regexFind ":[0-9]+$" $endpoint | trimPrefix ":" | default (ternary 80 443 (hasPrefix "http://" $endpoint)) -}}
{{- end }}
